-- include: common
-- include: job
-- include: burial
-- Promise a running job room in the budget for what it is going to store, by evicting others if that is what it takes (Q-12 to Q-14).
--
-- ARGV  1 job   2 fence   3 bytes it needs in all   4 limit, bytes   5 ms a tombstone stays   6 detail for the evictions   7 by whom
--       8... who may be evicted, in this order: id, registration, how many fields were seen, then those fields and values in turn
-- Returns {'ok' | 'over' | 'changed', loaded, reserved by others, retained, high water, all before, evicted...} | {'lost'}
--   over     not even all of them would make room       changed   one of them is not as it was seen: its id stands for the evicted
-- All or nothing: nobody is evicted unless that, and the promise with it, is what makes the room (Q-13), and no more than it takes.
-- A job has one reservation: asked again it is replaced when the new one fits, so asking twice promises once. At the limit fits.
local id, fence, bytes, limit = arg(1), arg(2), tonumber(arg(3)), tonumber(arg(4))
if run_of(id, fence) ~= 'run' then
  return {'lost'}
end
local v = redis.call('HMGET', key('budget'), 'loaded', 'reserved', 'retained', 'high_water')
local held = tonumber(redis.call('HGET', key('budget', 'reserved'), id) or '0')
local loaded, others = tonumber(v[1] or '0'), math.max(tonumber(v[2] or '0') - held, 0)
local answer = {'over', int(loaded), int(others), v[3] or '0', v[4] or '0'}
local missing = loaded + others + bytes - limit

local victims, at = {}, 13
while missing > 0 and at <= #ARGV do
  local ws, registered, fields = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local stands = redis.call('HGET', key('ws', ws), 'registration') == registered
  if not stands or holder_of(ws, '') or changed_since(ws, at - 2, at - 3 + 2 * fields) then
    return {'changed', answer[2], answer[3], answer[4], answer[5], ws}
  end
  at = at + 3 + 2 * fields
  victims[#victims + 1] = ws
  missing = missing - tonumber(redis.call('HGET', key('ws', ws), 'budgeted') or '0')
end
if missing <= 0 then
  answer[1] = 'ok'
  for _, ws in ipairs(victims) do
    evict(ws, 'budget', arg(6), arg(7), arg(5), '')
    answer[#answer + 1] = ws
  end
  redis.call('HSET', key('budget', 'reserved'), id, int(bytes))
  budget_add('reserved', bytes - held)
  budget_mark()
end
return answer
