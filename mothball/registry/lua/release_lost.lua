-- include: common
-- include: job
-- A run ended without an outcome (its process died, the worker shuts down): back to the queue at once.
--
-- ARGV  1 job   2 fence
-- Returns {'ok', doorbell to ring now: the job's own, or the next waiter's when the job was cancelled} | {'lost', {}}
local id, fence = arg(1), arg(2)
local status, ws = run_of(id, fence)
if status ~= 'run' then
  return {'lost', {}}
end
local v = redis.call('HMGET', key('job', id), 'cancel_requested', 'task', 'host')
drop_lease(id, ws, fence)
if v[1] == '1' then
  finalise_cancelled(id)
  return {'ok', next_waiter(ws)}
end
requeue(id, NOW + RING_AFTER)
count('jobs_lost')
event('job.lost', 'job', id, 'task', v[2], 'workspace', ws, 'host', v[3] or '', 'fence', fence)
return {'ok', doorbell(id)}
