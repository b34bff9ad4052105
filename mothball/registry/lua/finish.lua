-- include: common
-- include: job
-- include: captured
-- A run succeeded: outcome, workspace record, counters, events, lease and the next waiter in one step, under the fence.
--
-- ARGV  1 job   2 fence   3 outcome, JSON   4 '1' there is a workspace record to write
--       5 generation ('' leave)   6 digest ('' leave)   7 bytes ('' leave)   8 files ('' leave)
--       9 bytes this run added to the store ('' none)   10... other fields of the record, name and value in turn
-- Returns {'ok', doorbell of the next waiter or {}} | {'lost'}
-- Asked twice under one fence (the first answer was lost on the way), it answers ok and counts nothing again.
local id, fence, outcome, has_record = arg(1), arg(2), arg(3), arg(4)
local generation, digest, bytes, files, stored = arg(5), arg(6), arg(7), arg(8), arg(9)
local status, ws, state = run_of(id, fence)
if status == 'done' and state == 'succeeded' then
  return {'ok', {}}
end
if status ~= 'run' then
  return {'lost'}
end

local task = redis.call('HGET', key('job', id), 'task')
-- A job that evicted its own workspace, or another that is registered under the id since, has nothing to write there.
if has_record == '1' and ws ~= '' and redis.call('HGET', key('ws', ws), 'fence') == fence then
  local before = captured(id, ws, generation, digest, bytes, files, stored)
  if not before then
    return {'lost'}
  end
  if #ARGV > 14 then
    redis.call('HSET', key('ws', ws), unpack(ARGV, 15))
  end
  if generation ~= '' and tonumber(generation) <= before then
    count('captures_unchanged')
  end
end

finalise(id, 'succeeded', 'outcome', outcome, 'error_code', '', 'error', '')
count('jobs_succeeded')
count('jobs_succeeded:' .. task)
event('job.succeeded', 'job', id, 'task', task, 'workspace', ws)
drop_lease(id, ws, fence)
return {'ok', next_waiter(ws)}
