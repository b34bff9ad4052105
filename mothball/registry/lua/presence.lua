-- include: common
-- include: signs
-- include: state
-- Somebody works in a workspace, or says that it no longer does. Missing is not idle: who vanishes without a goodbye stays on the list.
--
-- ARGV  1 id   2 'heartbeat' | 'goodbye'   3 holder   4 ms until it is missed   5 debounce ms of the sign of life   6 most holders
--       7 its name
-- Returns {'ok', end of its presence in ms; for a goodbye 1 when it was there, else 0, state, why it is in that state}
--       | {'full', ''} | {'gone', reason} | {'not_found', ''}
local id, verb, holder = arg(1), arg(2), arg(3)
local code, why = workspace_error(id)
if code then
  return {code, why}
end
local list = key('presence', id)
local v = redis.call('HMGET', key('ws', id), 'state', 'state_reason')
local state, reason = v[1] or 'active', v[2] or ''
local before = tonumber(redis.call('ZSCORE', list, holder) or '')
if verb == 'goodbye' then
  redis.call('ZREM', list, holder)
  if before then
    sign(id, arg(7), tonumber(arg(5)))
    mark_due(id)
  end
  return {'ok', before and 1 or 0, state, reason}
end

local till = NOW + tonumber(arg(4))
if not before then
  local most = tonumber(arg(6))
  -- Of those that vanished the last few are enough to know that somebody did; of those that live none is dropped.
  if redis.call('ZCARD', list) >= most then
    local old = redis.call('ZCOUNT', list, '-inf', int(NOW)) - math.floor(most / 2)
    if old > 0 then
      redis.call('ZREMRANGEBYRANK', list, 0, old - 1)
    end
  end
  if redis.call('ZCARD', list) >= most then
    return {'full', ''}
  end
end
redis.call('ZADD', list, int(till), holder)
sign(id, arg(7), tonumber(arg(5)))
if not before or till < before then
  mark_due(id)
end
return {'ok', int(till), state, reason}
