-- include: common
-- include: job
-- Which doorbells have to be rung (again)? Handing one out moves its next time on, so two rings never hand out the same.
--
-- A job that nobody could run is not rung: without its workspace it ends as failed, without its host it waits for the host.
--
-- ARGV  1 most doorbells
-- Returns a list of doorbells {job, task, queue}
local limit = tonumber(arg(1))
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
    hand_out(id, out)
  end
end

-- 2. Retries whose time has come.
if room() > 0 then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('jobs', 'due'), '-inf', int(NOW), 'LIMIT', 0, room())) do
    if redis.call('HGET', key('job', id), 'state') == 'queued' then
      requeue(id, NOW + RING_AFTER)
      hand_out(id, out)
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
        hand_out(bell[1], out)
      end
    end
  end
end

-- 4. Queued too long: the message was lost, or its worker is away. Each time the pause doubles.
if room() > 0 then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('jobs', 'ring'), '-inf', int(NOW), 'LIMIT', 0, room())) do
    if redis.call('HGET', key('job', id), 'state') == 'queued' then
      local rings = redis.call('HINCRBY', key('job', id), 'rings', 1)
      local pause = math.min(RING_AFTER * 2 ^ math.min(rings, 30), RING_MAX)
      redis.call('ZADD', key('jobs', 'ring'), int(NOW + pause), id)
      hand_out(id, out)
    else
      redis.call('ZREM', key('jobs', 'ring'), id)
    end
  end
end

trim_finished(200)
return out
