-- include: common
-- include: job
-- A run ended without an outcome (its process died, the worker shuts down): back to the queue at once.
-- An orderly shutdown says nothing about the job, so it does not count towards the limit of lost runs.
--
-- ARGV  1 job   2 fence   3 '1' interrupted by an orderly shutdown
-- Returns {'ok', doorbell to ring now: the job's own, or the next waiter's when the job was cancelled} | {'lost', {}}
local id, fence, interrupted = arg(1), arg(2), arg(3) == '1'
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
if interrupted then
  redis.call('HINCRBY', key('job', id), 'interrupted', 1)
else
  count('jobs_lost')
end
event(interrupted and 'job.interrupted' or 'job.lost', 'job', id, 'task', v[2], 'workspace', ws, 'host', v[3] or '', 'fence', fence)
return {'ok', doorbell(id)}
