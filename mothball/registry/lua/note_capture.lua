-- include: common
-- include: job
-- include: captured
-- A run that goes on has captured its workspace: the record says so now, whatever becomes of the run.
--
-- ARGV  1 job   2 fence   3 generation   4 digest   5 bytes   6 files   7 bytes the capture added to the store
-- Returns {'ok'} | {'lost'}. Asked again, or of a generation that is known, it changes and counts nothing.
local id, fence, generation = arg(1), arg(2), arg(3)
local status, ws = run_of(id, fence)
if status ~= 'run' or ws == '' or redis.call('HGET', key('ws', ws), 'fence') ~= fence then
  return {'lost'}
end
local v = redis.call('HMGET', key('ws', ws), 'generation', 'digest')
if tonumber(generation) == tonumber(v[1] or '0') and v[2] == short_digest(arg(4)) then
  redis.call('HSET', key('ws', ws), 'last_good_at', int(NOW))
  redis.call('HDEL', key('ws', ws), 'last_error', 'retry_count')
  return {'ok'}
end
if not captured(id, ws, generation, arg(4), arg(5), arg(6), arg(7)) then
  return {'lost'}
end
return {'ok'}
