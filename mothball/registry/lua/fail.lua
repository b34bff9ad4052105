-- include: common
-- include: job
-- A run failed: once more later (Q-50), or for good. The workspace may remember the error (Q-07).
--
-- ARGV  1 job   2 fence   3 error code   4 message   5 '1' the same request may succeed later   6 most failed runs
--       7 jitter, per mille of the delay (chosen by the caller: a script has no chance of its own)   8 '1' the workspace remembers
--       9... delays in ms by failed run
-- Returns {'ok', state, due_at ('0' none), doorbell of the next waiter or {}} | {'lost'}
-- Asked twice under one fence, it answers what it answered and counts nothing again.
local id, fence, code, message = arg(1), arg(2), arg(3), arg(4)
local retryable, max_attempts, jitter = arg(5) == '1', tonumber(arg(6)), tonumber(arg(7))
local status, ws = run_of(id, fence)
local record = key('job', id)
if status ~= 'run' then
  local v = redis.call('HMGET', record, 'failed_fence', 'state', 'due_at')
  if v[1] == fence then
    return {'ok', v[2], v[3], {}}
  end
  return {'lost'}
end

local v = redis.call('HMGET', record, 'task', 'cancel_requested')
local due = 0
redis.call('HSET', record, 'failed_fence', fence)
if v[2] == '1' then
  -- Somebody asked for its end; that it ended badly is no failure of the workspace (Q-36).
  finalise_cancelled(id)
else
  local attempts = redis.call('HINCRBY', record, 'attempts', 1)
  if ws ~= '' and arg(8) == '1' and redis.call('HGET', key('ws', ws), 'fence') == fence then
    redis.call('HSET', key('ws', ws), 'last_error', message)
    redis.call('HINCRBY', key('ws', ws), 'retry_count', 1)
  end
  if retryable and attempts < max_attempts then
    local delay = tonumber(arg(math.min(8 + attempts, #ARGV - 5)))
    due = NOW + delay + math.floor(delay * jitter / 1000)
    requeue(id, due)
    redis.call('ZREM', key('jobs', 'queued'), id)
    redis.call('ZREM', key('jobs', 'ring'), id)
    redis.call('ZADD', key('jobs', 'due'), int(due), id)
    redis.call('HSET', record, 'due_at', int(due), 'error_code', code, 'error', message)
    count('jobs_retried')
    event('job.retry', 'job', id, 'task', v[1], 'workspace', ws, 'code', code, 'error', message, 'attempt', int(attempts), 'due_at', int(due))
  else
    finalise_failed(id, code, message)
  end
end
drop_lease(id, ws, fence)
return {'ok', redis.call('HGET', record, 'state'), int(due), next_waiter(ws)}
