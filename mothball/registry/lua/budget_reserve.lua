-- include: common
-- include: job
-- Promise a running job room in the budget for what it is going to store (Q-12, Q-14).
--
-- ARGV  1 job   2 fence   3 bytes it needs in all   4 limit, bytes
-- Returns {'ok' | 'over', loaded, reserved by others, retained, high water, all before} | {'lost'}
-- A job has one reservation: asked again it is replaced when the new one fits, so asking twice promises once. At the limit fits.
local id, fence, bytes, limit = arg(1), arg(2), tonumber(arg(3)), tonumber(arg(4))
if run_of(id, fence) ~= 'run' then
  return {'lost'}
end
local v = redis.call('HMGET', key('budget'), 'loaded', 'reserved', 'retained', 'high_water')
local held = tonumber(redis.call('HGET', key('budget', 'reserved'), id) or '0')
local loaded, others = tonumber(v[1] or '0'), math.max(tonumber(v[2] or '0') - held, 0)
local answer = {'over', int(loaded), int(others), v[3] or '0', v[4] or '0'}
if loaded + others + bytes <= limit then
  answer[1] = 'ok'
  redis.call('HSET', key('budget', 'reserved'), id, int(bytes))
  budget_add('reserved', bytes - held)
  budget_mark()
end
return answer
