-- What a capture says of its workspace. Needs common.lua and job.lua before it.

-- captured(job, ws, generation, digest, bytes, files, stored): write it into the record; '' leaves a field, `stored` is what the capture
-- added to the store. A generation above the known one counts and is an event. Returns the generation that was known, nil (and
-- nothing is written) when that is above this one.
local function captured(job, ws, generation, digest, bytes, files, stored)
  local record = key('ws', ws)
  local v = redis.call('HMGET', record, 'generation', 'high_water_bytes', 'host', 'repo')
  local before = tonumber(v[1] or '0')
  local now = generation ~= '' and tonumber(generation) or before
  if now < before then
    return nil
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
    budget_refund(job) -- before they count as loaded: a publication moves bytes, it is no second demand (Q-15)
    budget_settle(ws)
    count('capture_stored_bytes', stored)
  end
  if now > before then
    count('captures')
    event('workspace.captured', 'workspace', ws, 'job', job, 'generation', int(now), 'digest', digest, 'bytes', bytes,
      'files', files, 'stored_bytes', stored)
  end
  return before
end
