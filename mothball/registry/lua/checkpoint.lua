-- include: common
-- include: job
-- May this run go on, and does it hold its lease at this moment? Optionally records progress.
--
-- ARGV  1 job   2 fence   3 ms to take a lease for that ran out while nobody took over   4 progress, JSON ('' leave it)
-- Returns {'ok', cancel requested '0'|'1'} | {'lost'}
local id, fence, lease_ms, progress = arg(1), arg(2), tonumber(arg(3)), arg(4)
local status, ws = run_of(id, fence)
if status ~= 'run' then
  return {'lost'}
end
local v = redis.call('HMGET', key('job', id), 'host', 'cancel_requested')
if redis.call('EXISTS', lease_key(id, ws)) == 0 then
  take_lease(id, ws, fence, v[1] or '', lease_ms)
end
if progress ~= '' then
  redis.call('HSET', key('job', id), 'progress', progress)
end
return {'ok', v[2] or '0'}
