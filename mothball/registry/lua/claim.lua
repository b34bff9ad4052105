-- include: common
-- include: job
-- A worker has heard a doorbell: may it run this job now?
--
-- ARGV  1 job   2 host of the worker   3 worker   4 lease ms   5 most runs that may end without an outcome
--       6 task of the message ('' any)   7 '1' adopt a message that has no record   8 its task   9 its arguments, JSON
--       10 its workspace ('' none)   11 its queue (used without workspace; host.<host> for a job of a host)
-- Returns {status, fence, HGETALL of the job, doorbell of the next waiter or {}}; status is one of
--   run        the caller holds the lease under `fence`, or holds it already: the same worker asks when an answer was lost
--   done | cancelled | dead   finished        elsewhere   running under a live lease
--   waiting    another job holds the workspace's lease; this one is on the wait list and will be rung
--   not_due    a retry whose time has not come        wrong_host   job.queue says where
--   unknown    no such job                            mismatch   the record is of another task than the message
local id, host, worker, lease_ms, max_runs = arg(1), arg(2), arg(3), tonumber(arg(4)), tonumber(arg(5))
local record = key('job', id)

local function answer(status, fence, next_one)
  return {status, fence or '0', redis.call('HGETALL', record), next_one or {}}
end

if redis.call('EXISTS', record) == 0 then
  if arg(7) ~= '1' then
    return {'unknown', '0', {}, {}}
  end
  local ws, queue, owner = arg(10), arg(11), ''
  if ws ~= '' then
    owner = redis.call('HGET', key('ws', ws), 'host') or ''
    if owner ~= '' then
      queue = 'host.' .. owner
    end
  else
    owner = host_of(queue) or ''
  end
  create_job(id, ws, 'task', arg(8), 'args', arg(9), 'host', owner, 'queue', queue, 'lane', '', 'lane_key', '', 'origin', 'adopted')
  event('job.submitted', 'job', id, 'task', arg(8), 'workspace', ws, 'queue', queue, 'origin', 'adopted')
  -- A queue that no worker ever consumed would keep the message for ever: submit refuses such a host too.
  if ws == '' and owner ~= '' and owner ~= host and redis.call('EXISTS', key('host', owner)) == 0 then
    finalise_failed(id, 'host_offline', 'no worker has announced host ' .. owner)
    return answer('done')
  end
end

local v = redis.call('HMGET', record, 'state', 'workspace', 'queue', 'due_at', 'deliveries', 'attempts', 'cancel_requested',
  'waiting', 'task', 'interrupted', 'worker', 'fence')
local state, ws, queue = v[1], v[2], v[3]
if arg(6) ~= '' and arg(6) ~= v[9] then
  return answer('mismatch')
end
if state == 'succeeded' or state == 'failed' then
  return answer('done')
elseif FINAL[state] then
  return answer(state)
end

-- Gone before wrong_host: a job of a vanished workspace ends wherever it is heard.
if ws ~= '' then
  local code, message = workspace_lost(id, ws)
  if code then
    finalise_failed(id, code, message)
    return answer('done')
  end
end
local holder = redis.call('HGET', lease_key(id, ws), 'job')
if state == 'running' and holder == id then
  if v[11] == worker and worker ~= '' and run_of(id, v[12]) == 'run' then
    take_lease(id, ws, v[12], host, lease_ms)
    return answer('run', v[12])
  end
  return answer('elsewhere')
end
local owner = host_of(queue)
if owner and owner ~= host then
  return answer('wrong_host')
end

if v[7] == '1' then
  finalise_cancelled(id)
  return answer('cancelled', '0', next_waiter(ws))
end
if state == 'queued' and tonumber(v[4]) > NOW then
  return answer('not_due')
end
if holder and holder ~= id then
  if state == 'running' or v[4] ~= '0' then
    -- A retry whose time has come waits as a queued job: it must not be rung by its time as well.
    requeue(id, NOW + RING_AFTER)
  end
  if redis.call('HGET', record, 'waiting') ~= '1' then
    redis.call('RPUSH', key('wait', ws), id)
    redis.call('HSET', record, 'waiting', '1')
  end
  -- The lease's end is what this job waits for; repeating its doorbell meanwhile would only make noise.
  redis.call('ZREM', key('jobs', 'ring'), id)
  redis.call('ZADD', key('waiting'), 'NX', int(NOW + math.max(redis.call('PTTL', key('lease', ws)), 0)), ws)
  return answer('waiting')
end

-- Failed runs have an outcome and a limit of their own; only runs that vanished count against this one.
local deliveries = tonumber(v[5]) + 1
local vanished = deliveries - 1 - tonumber(v[6]) - tonumber(v[10] or '0')
if vanished >= max_runs then
  local message = 'given up after ' .. int(vanished) .. ' runs that ended without an outcome'
  finalise(id, 'dead', 'error_code', 'operation_failed', 'error', message)
  if ws ~= '' then
    redis.call('HSET', key('ws', ws), 'last_error', message)
    redis.call('HINCRBY', key('ws', ws), 'retry_count', 1)
  end
  count('jobs_dead')
  event('job.dead', 'job', id, 'task', v[9], 'workspace', ws, 'error', message)
  return answer('dead', '0', next_waiter(ws))
end

local fence
if ws ~= '' then
  fence = next_fence(redis.call('HGET', key('ws', ws), 'fence'))
  redis.call('HSET', key('ws', ws), 'fence', fence)
else
  fence = next_fence(v[12])
end
free_lane(id)
leave_indexes(id)
leave_wait_list(id, ws)
redis.call('HSET', record, 'state', 'running', 'started_at', int(NOW), 'deliveries', int(deliveries), 'fence', fence, 'worker', worker,
  'host', host, 'progress', '{}', 'due_at', '0', 'waiting', '')
take_lease(id, ws, fence, host, lease_ms)
refresh_list(ws)
event('job.started', 'job', id, 'task', v[9], 'workspace', ws, 'host', host, 'worker', worker, 'fence', fence, 'delivery', int(deliveries))
return answer('run', fence)
