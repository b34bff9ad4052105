-- include: common
-- include: job
-- Cancel: a queued job at once, a running one at its next checkpoint, a finished one not at all (Q-37).
--
-- ARGV  1 job
-- Returns {'ok', cancelled 0|1, state} | {'not_found'}
local id = arg(1)
local state = redis.call('HGET', key('job', id), 'state')
if not state then
  return {'not_found'}
elseif state == 'queued' then
  finalise_cancelled(id)
  return {'ok', 1, 'cancelled'}
elseif state == 'running' then
  -- The flag belongs to this job's record, so it can never reach the next run of an idle workspace.
  redis.call('HSET', key('job', id), 'cancel_requested', '1')
  return {'ok', 1, 'running'}
end
return {'ok', 0, state}
