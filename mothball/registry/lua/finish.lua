-- include: common
-- include: job
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
  local record = key('ws', ws)
  local v = redis.call('HMGET', record, 'generation', 'high_water_bytes', 'host', 'repo')
  local before = tonumber(v[1] or '0')
  local now = generation ~= '' and tonumber(generation) or before
  if now < before then
    return {'lost'}
  end
  redis.call('HSET', record, 'generation', int(now), 'last_good_at', int(NOW))
  redis.call('HDEL', record, 'last_error', 'retry_count')
  if digest ~= '' then
    redis.call('HSET', record, 'digest', short_digest(digest))
    if (v[4] or '') ~= '' then
      redis.call('ZADD', key('ws', 'good', v[3], v[4]), int(NOW), ws)
    end
  end
  if bytes ~= '' then
    redis.call('HSET', record, 'bytes', bytes)
    if tonumber(bytes) > tonumber(v[2] or '0') then
      redis.call('HSET', record, 'high_water_bytes', bytes) -- Q-04: a smaller capture never lowers it
    end
  end
  if files ~= '' then
    redis.call('HSET', record, 'files', files)
  end
  if stored ~= '' then
    redis.call('HINCRBY', record, 'stored_bytes', stored)
    budget_refund(id) -- before they count as loaded: a publication moves bytes, it is no second demand (Q-15)
    budget_settle(ws)
    count('capture_stored_bytes', stored)
  end
  if #ARGV > 14 then
    redis.call('HSET', record, unpack(ARGV, 15))
  end
  if now > before then
    count('captures')
    event('workspace.captured', 'workspace', ws, 'job', id, 'generation', int(now), 'digest', digest, 'bytes', bytes,
      'files', files, 'stored_bytes', stored)
  elseif generation ~= '' then
    count('captures_unchanged')
  end
end

finalise(id, 'succeeded', 'outcome', outcome, 'error_code', '', 'error', '')
count('jobs_succeeded')
count('jobs_succeeded:' .. task)
event('job.succeeded', 'job', id, 'task', task, 'workspace', ws)
drop_lease(id, ws, fence)
return {'ok', next_waiter(ws)}
