-- include: budget
-- What the scripts of the job life share. Needs common.lua before it.
--
-- Keys of a job:
--   job:<job>           HASH   the record
--   jobs:queued         ZSET   queued, by submit time        jobs:due      ZSET  queued for a retry, by due time
--   jobs:running        ZSET   running, by lease deadline    jobs:ring     ZSET  queued, by the next repeat of its doorbell
--   jobs:<final state>  ZSET   finished, by finish time      jobs:created  ZSET  all, by submit time
--   jobs:away:<host>    ZSET   queued for a host that is offline, by submit time: not rung until it comes back
--   jobs:ws:<ws>        ZSET   the jobs of a workspace, by submit time; TTL unless one of them waits for its host
--   lane:<lane>:<key>   STRING the one queued job that a same request joins
--   wait:<ws>           LIST   jobs waiting for the lease;   waiting       ZSET  workspaces with waiters, by the time to look again
--   lease:<ws>          HASH, PX    job, fence, host; a job without workspace uses lease:~<job>
local FINAL = {succeeded = true, failed = true, cancelled = true, dead = true}
local KEPT_PER_WORKSPACE = 1000

local function lease_key(id, ws)
  if ws ~= '' then
    return key('lease', ws)
  end
  return key('lease', '~' .. id)
end

-- What the caller rings now. The arguments stay in the record: a message is a doorbell, not a parcel.
local function doorbell(id)
  local v = redis.call('HMGET', key('job', id), 'task', 'queue')
  redis.call('HSET', key('job', id), 'rung_at', int(NOW))
  return {id, v[1] or '', v[2] or ''}
end

-- The list of a workspace's jobs outlives the longest pause between two doorbells and the record of the last job.
local function refresh_list(ws)
  if ws ~= '' then
    redis.call('PEXPIRE', key('jobs', 'ws', ws), int(JOB_TTL + RING_MAX))
  end
end

-- The host that alone may run a job of `queue`, nil when any may.
local function host_of(queue)
  return string.match(queue or '', '^host%.(.+)$')
end

local function leave_indexes(id)
  redis.call('ZREM', key('jobs', 'queued'), id)
  redis.call('ZREM', key('jobs', 'due'), id)
  redis.call('ZREM', key('jobs', 'ring'), id)
  redis.call('ZREM', key('jobs', 'running'), id)
  local host = host_of(redis.call('HGET', key('job', id), 'queue'))
  if host then
    redis.call('ZREM', key('jobs', 'away', host), id)
  end
end

local function leave_wait_list(id, ws)
  if redis.call('HGET', key('job', id), 'waiting') == '1' then
    redis.call('LREM', key('wait', ws), 0, id)
    if redis.call('EXISTS', key('wait', ws)) == 0 then
      redis.call('ZREM', key('waiting'), ws)
    end
  end
end

-- The registration a workspace is at: an id that was released and registered again is another workspace.
local function registration(ws)
  return ws ~= '' and redis.call('HGET', key('ws', ws), 'registration') or ''
end

-- Why a job has lost its workspace: code and message, or nil while that is the one it was submitted for.
local function workspace_lost(id, ws)
  if ws == '' then
    return nil
  end
  local code, reason = workspace_error(ws)
  if code then
    return code, 'workspace ' .. ws .. (code == 'gone' and ' is gone: ' .. reason or ' is not known')
  end
  local of = redis.call('HGET', key('job', id), 'registration')
  if of and of ~= '' and of ~= registration(ws) then
    return 'gone', 'workspace ' .. ws .. ' is gone: it was released and registered again'
  end
  return nil
end

-- create_job(id, ws, field, value, ...): a queued record; its first doorbell is the caller's to ring.
local function create_job(id, ws, ...)
  redis.call('HSET', key('job', id),
    'id', id, 'workspace', ws, 'state', 'queued', 'submitted_at', int(NOW), 'attempts', '0', 'deliveries', '0',
    'fence', '0', 'joined', '0', 'rings', '0', 'due_at', '0', 'cancel_requested', '0', 'rung_at', int(NOW),
    'registration', registration(ws), ...)
  redis.call('ZADD', key('jobs', 'created'), int(NOW), id)
  redis.call('ZADD', key('jobs', 'queued'), int(NOW), id)
  redis.call('ZADD', key('jobs', 'ring'), int(NOW + RING_AFTER), id)
  if ws ~= '' then
    redis.call('ZADD', key('jobs', 'ws', ws), int(NOW), id)
    redis.call('ZREMRANGEBYRANK', key('jobs', 'ws', ws), 0, -(KEPT_PER_WORKSPACE + 1))
    refresh_list(ws)
  end
  count('jobs_submitted')
end

-- A lane is freed only by the job that holds it: a newer request may have taken it meanwhile.
local function free_lane(id)
  local lane = redis.call('HGET', key('job', id), 'lane_key')
  if lane and lane ~= '' and redis.call('GET', key('lane', lane)) == id then
    redis.call('DEL', key('lane', lane))
  end
end

-- Back to the queue. The lane is taken again when nobody else parked there, so a request that comes now joins (Q-51).
local function requeue(id, ring_at)
  local v = redis.call('HMGET', key('job', id), 'submitted_at', 'lane_key', 'workspace')
  leave_indexes(id)
  leave_wait_list(id, v[3] or '')
  budget_refund(id)
  redis.call('HSET', key('job', id), 'state', 'queued', 'rings', '0', 'due_at', '0', 'waiting', '', 'worker', '',
    'rung_at', '0')
  redis.call('ZADD', key('jobs', 'queued'), v[1], id)
  redis.call('ZADD', key('jobs', 'ring'), int(ring_at), id)
  if v[2] and v[2] ~= '' then
    redis.call('SET', key('lane', v[2]), id, 'NX')
  end
  refresh_list(v[3] or '')
end

-- Index entries of records that have run out; a few at every finish, so no finish is slow and none is left behind.
local function trim_finished(batch)
  for state in pairs(FINAL) do
    local old = redis.call('ZRANGEBYSCORE', key('jobs', state), '-inf', '(' .. int(NOW - JOB_TTL), 'LIMIT', 0, batch)
    if #old > 0 then
      redis.call('ZREM', key('jobs', state), unpack(old))
      redis.call('ZREM', key('jobs', 'created'), unpack(old))
    end
  end
end

-- finalise(id, state, field, value, ...): the record's last state; from here on it lives for JOB_TTL.
local function finalise(id, state, ...)
  local ws = redis.call('HGET', key('job', id), 'workspace') or ''
  free_lane(id)
  leave_indexes(id)
  leave_wait_list(id, ws)
  budget_refund(id)
  redis.call('HSET', key('job', id), 'state', state, 'finished_at', int(NOW), 'waiting', '', 'due_at', '0', ...)
  redis.call('HDEL', key('job', id), 'parts')
  redis.call('PEXPIRE', key('job', id), int(JOB_TTL))
  redis.call('ZADD', key('jobs', state), int(NOW), id)
  refresh_list(ws)
  trim_finished(10)
end

local function finalise_cancelled(id)
  local v = redis.call('HMGET', key('job', id), 'workspace', 'task')
  finalise(id, 'cancelled', 'error_code', 'cancelled', 'error', 'job ' .. id .. ' was cancelled')
  count('jobs_cancelled')
  event('job.cancelled', 'job', id, 'task', v[2] or '', 'workspace', v[1] or '')
end

local function finalise_failed(id, code, message)
  local v = redis.call('HMGET', key('job', id), 'workspace', 'task')
  finalise(id, 'failed', 'error_code', code, 'error', message)
  count('jobs_failed')
  count('jobs_failed:' .. (v[2] or ''))
  event('job.failed', 'job', id, 'task', v[2] or '', 'workspace', v[1] or '', 'code', code, 'error', message)
end

-- hand_out(id, out): the doorbell of a queued job into `out`, unless nobody could come: a job whose workspace was lost ends here,
-- and one whose host is offline is set aside until check_hosts finds that host again.
local function hand_out(id, out)
  local v = redis.call('HMGET', key('job', id), 'workspace', 'queue', 'submitted_at')
  local ws = v[1] or ''
  local code, message = workspace_lost(id, ws)
  local host = host_of(v[2])
  if code then
    finalise_failed(id, code, message)
  elseif host and redis.call('ZSCORE', key('hosts', 'offline'), host) then
    redis.call('ZREM', key('jobs', 'ring'), id)
    redis.call('ZADD', key('jobs', 'away', host), v[3], id)
    if ws ~= '' then
      redis.call('PERSIST', key('jobs', 'ws', ws))
    end
  else
    refresh_list(ws)
    out[#out + 1] = doorbell(id)
  end
end

-- The run of `id` under `fence`: 'run', 'done' (finished under this very fence: the caller asks twice) or 'lost'.
-- A lease that ran out while nobody took over does not end a run: the fence says whether somebody did.
local function run_of(id, fence)
  local v = redis.call('HMGET', key('job', id), 'state', 'fence', 'workspace', 'buried')
  local state, ws = v[1], v[3] or ''
  if not state or v[2] ~= fence then
    return 'lost', ws, state or ''
  end
  if state ~= 'running' then
    return FINAL[state] and 'done' or 'lost', ws, state
  end
  -- A job that evicted its own workspace (evict.lua) has no record left that could say otherwise.
  if ws ~= '' and v[4] ~= '1' and redis.call('HGET', key('ws', ws), 'fence') ~= fence then
    return 'lost', ws, state
  end
  local holder = redis.call('HMGET', lease_key(id, ws), 'job', 'fence')
  if holder[1] and (holder[1] ~= id or holder[2] ~= fence) then
    return 'lost', ws, state
  end
  return 'run', ws, state
end

local function take_lease(id, ws, fence, host, lease_ms)
  local lease = lease_key(id, ws)
  redis.call('DEL', lease)
  redis.call('HSET', lease, 'job', id, 'fence', fence, 'host', host)
  redis.call('PEXPIRE', lease, lease_ms)
  redis.call('ZADD', key('jobs', 'running'), int(NOW + lease_ms), id)
end

-- The end of a run. It is no sign of life, whoever asked for the job (B-44): captures at regular times would else keep for ever what
-- nobody uses.
local function drop_lease(id, ws, fence)
  local lease = lease_key(id, ws)
  local holder = redis.call('HMGET', lease, 'job', 'fence')
  if holder[1] == id and holder[2] == fence then
    redis.call('DEL', lease)
  end
end

-- The next fence after `last`. Redis may come back without its last writes, and then a count would repeat itself: time does not.
local function next_fence(last)
  return int(math.max((tonumber(last or '0') or 0) + 1, NOW))
end

-- Doorbell of the job that has waited longest for the lease of `ws`, {} when there is none or the lease is held.
local function next_waiter(ws)
  if ws == '' or redis.call('EXISTS', key('lease', ws)) == 1 then
    return {}
  end
  local found = {}
  for _ = 1, 100 do
    local id = redis.call('LPOP', key('wait', ws))
    if not id then
      break
    end
    local v = redis.call('HMGET', key('job', id), 'state', 'due_at')
    if v[1] then
      redis.call('HSET', key('job', id), 'waiting', '')
    end
    -- A retry whose time has not come stays out of the list: its own time rings it.
    if v[1] == 'queued' and tonumber(v[2] or '0') <= NOW then
      redis.call('HSET', key('job', id), 'rings', '0')
      redis.call('ZADD', key('jobs', 'ring'), int(NOW + RING_AFTER), id)
      found = doorbell(id)
      break
    end
  end
  if redis.call('EXISTS', key('wait', ws)) == 1 then
    redis.call('ZADD', key('waiting'), int(NOW + RING_AFTER), ws)
  else
    redis.call('ZREM', key('waiting'), ws)
  end
  return found
end
