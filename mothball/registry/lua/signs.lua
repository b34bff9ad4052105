-- Signs of life. Needs common.lua before it.
--
-- Every signal has its own last time in the record (`sig:<name>`, ms); last_active is the last time any of them counted.
local MOST_FIELDS = 100

-- sign(id, signal, debounce): returns moved 0|1, last_active, signal that set it; nil when there is no record. Moves a time only when strictly more than the
-- debounce (ms) has passed since (D-06), and never backwards: a Redis that took over may be a second behind.
local function sign(id, signal, debounce)
  -- The hottest path of all: names and the time are put together once.
  local record, own, now = NS .. ':ws:' .. id, 'sig:' .. signal, int(NOW)
  local v = redis.call('HMGET', record, 'last_active', 'last_signal', own)
  if not v[1] then
    return nil
  end
  local moved = NOW - tonumber(v[1]) > debounce
  -- Signals are words that producers choose: a record never grows without end because somebody invents new ones.
  local noted = NOW - tonumber(v[3] or '0') > debounce and (v[3] or redis.call('HLEN', record) < MOST_FIELDS)
  if moved and noted then
    redis.call('HSET', record, 'last_active', now, 'last_signal', signal, own, now)
  elseif moved then
    redis.call('HSET', record, 'last_active', now, 'last_signal', signal)
  elseif noted then
    redis.call('HSET', record, own, now)
  end
  if moved then
    redis.call('ZADD', NS .. ':ws:by:active', now, id)
    return 1, now, signal
  end
  return 0, v[1], v[2]
end
