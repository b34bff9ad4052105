-- include: common
-- include: job
-- Which doorbells have to be rung (again)? Handing one out moves its next time on, so two rings never hand out the same.
--
-- ARGV  1 most doorbells   2 longest pause between two doorbells of a queued job, ms
-- Returns a list of doorbells {job, task, queue}
local limit, longest = tonumber(arg(1)), tonumber(arg(2))
local out = {}

local function room()
  return limit - #out
end

-- 1. Runs whose lease ran out.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('jobs', 'running'), '-inf', int(NOW), 'LIMIT', 0, room())) do
  local v = redis.call('HMGET', key('job', id), 'state', 'workspace', 'cancel_requested', 'task', 'host', 'fence')
  local ws = v[2] or ''
  local lease = lease_key(id, ws)
  if v[1] ~= 'running' then
    redis.call('ZREM', key('jobs', 'running'), id)
  elseif redis.call('HGET', lease, 'job') == id then
    redis.call('ZADD', key('jobs', 'running'), int(NOW + math.max(redis.call('PTTL', lease), 1)), id)
  elseif v[3] == '1' then
    finalise_cancelled(id)
  else
    requeue(id, NOW + RING_AFTER)
    count('jobs_lost')
    event('job.lost', 'job', id, 'task', v[4], 'workspace', ws, 'host', v[5] or '', 'fence', v[6] or '')
    out[#out + 1] = doorbell(id)
  end
end

-- 2. Retries whose time has come.
if room() > 0 then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('jobs', 'due'), '-inf', int(NOW), 'LIMIT', 0, room())) do
    if redis.call('HGET', key('job', id), 'state') == 'queued' then
      requeue(id, NOW + RING_AFTER)
      out[#out + 1] = doorbell(id)
    else
      redis.call('ZREM', key('jobs', 'due'), id)
    end
  end
end

-- 3. Wait lists whose lease is gone (the run that would have handed over died).
if room() > 0 then
  for _, ws in ipairs(redis.call('ZRANGEBYSCORE', key('waiting'), '-inf', int(NOW), 'LIMIT', 0, room())) do
    local left = redis.call('PTTL', key('lease', ws))
    if left > 0 then
      redis.call('ZADD', key('waiting'), int(NOW + left), ws)
    else
      local bell = next_waiter(ws)
      if #bell > 0 then
        out[#out + 1] = bell
      end
    end
  end
end

-- 4. Queued too long: the message was lost, or its worker is away. Each time the pause doubles.
if room() > 0 then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('jobs', 'ring'), '-inf', int(NOW), 'LIMIT', 0, room())) do
    local v = redis.call('HMGET', key('job', id), 'state', 'workspace')
    if v[1] == 'queued' then
      local rings = redis.call('HINCRBY', key('job', id), 'rings', 1)
      local pause = math.min(RING_AFTER * 2 ^ math.min(rings, 30), math.max(longest, RING_AFTER))
      redis.call('ZADD', key('jobs', 'ring'), int(NOW + pause), id)
      refresh_list(v[2] or '')
      out[#out + 1] = doorbell(id)
    else
      redis.call('ZREM', key('jobs', 'ring'), id)
    end
  end
end

trim_finished(200)
return out
