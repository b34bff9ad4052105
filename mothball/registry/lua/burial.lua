-- include: budget
-- include: state
-- How a record becomes a tombstone. Needs common.lua before it.
--
--   ws:gone:<id>  HASH, TTL  reason, detail, by, at, receipt, digest, generation, fence, and the whole record: its fields after `r:`

-- bury(id, reason, detail, by, ttl, receipt): no capture and no directory is touched. Returns the record as a table.
local function bury(id, reason, detail, by, ttl, receipt)
  local record = key('ws', id)
  local was, kept = {}, {}
  local flat = redis.call('HGETALL', record)
  for n = 1, #flat, 2 do
    was[flat[n]] = flat[n + 1]
    kept[#kept + 1] = 'r:' .. flat[n]
    kept[#kept + 1] = flat[n + 1]
  end
  local host, repo = was.host or '', was.repo or ''
  budget_bury(id)
  census(id, was.state or 'active', '')
  redis.call('DEL', record, key('presence', id))
  redis.call('ZREM', key('ws', 'by', 'created'), id)
  redis.call('ZREM', key('ws', 'by', 'active'), id)
  redis.call('ZREM', key('ws', 'by', 'deadline'), id)
  redis.call('ZREM', key('ws', 'due', 'evict'), id)
  redis.call('ZREM', key('ws', 'due', 'stop'), id)
  redis.call('SREM', key('ws', 'host', host), id)
  if repo ~= '' then
    redis.call('SREM', key('ws', 'repo', repo), id)
    redis.call('ZREM', key('ws', 'good', host, repo), id)
  end
  -- Queued jobs come before the next ring, which ends them as `gone`, whether their host lives or not: those that wait for the
  -- lease, for the time of a retry or for their host as well. More waiters than this batch stay on the list, which the ring empties.
  for _ = 1, 500 do
    local job = redis.call('LPOP', key('wait', id))
    if not job then
      break
    end
    if redis.call('EXISTS', key('job', job)) == 1 then
      redis.call('HSET', key('job', job), 'waiting', '')
      redis.call('ZADD', key('jobs', 'ring'), int(NOW), job)
    end
  end
  for _, job in ipairs(redis.call('ZRANGE', key('jobs', 'ws', id), 0, -1)) do
    if redis.call('HGET', key('job', job), 'state') == 'queued' then
      redis.call('ZREM', key('jobs', 'away', host), job)
      redis.call('ZADD', key('jobs', 'ring'), int(NOW), job)
    end
  end
  if redis.call('EXISTS', key('wait', id)) == 1 then
    redis.call('ZADD', key('waiting'), int(NOW), id)
  else
    redis.call('ZREM', key('waiting'), id)
  end
  local tomb = key('ws', 'gone', id)
  redis.call('DEL', tomb)
  redis.call('HSET', tomb, 'reason', reason, 'at', int(NOW), 'by', by, 'digest', whole_digest(was.digest),
    'generation', was.generation or '0', 'fence', was.fence or '0', unpack(kept))
  if detail ~= '' then
    redis.call('HSET', tomb, 'detail', detail)
  end
  if receipt ~= '' then
    redis.call('HSET', tomb, 'receipt', receipt)
  end
  redis.call('PEXPIRE', tomb, ttl)
  return was
end

-- changed_since(id, n, last): what is not as a decision by policy saw it (as_seen's arguments), nil when it may be carried out.
local function changed_since(id, n, last)
  local record = key('ws', id)
  local v = redis.call('HMGET', record, 'state', 'pinned')
  local same, till = as_seen(record, n, last)
  if not same or held(record) or v[2] == '1' or not EVICTABLE[v[1] or 'active'] then
    return 'record'
  elseif present(id, till) then
    return 'presence'
  elseif job_queued(id) then
    return 'queued'
  end
  return nil
end

-- evict(...): the burial with its counter and its event.
local function evict(id, rule, detail, by, ttl, receipt)
  local was = bury(id, rule, detail, by, ttl, receipt)
  count('evicted:' .. rule)
  event('workspace.evicted', 'workspace', id, 'reason', rule, 'detail', detail, 'by', by, 'host', was.host or '', 'repo', was.repo or '',
    'digest', whole_digest(was.digest), 'generation', was.generation or '0', 'stored_bytes', was.stored_bytes or '0')
  if receipt ~= '' then
    count('workspaces_purged')
    event('workspace.purged', 'workspace', id, 'reason', rule, 'by', by, 'host', was.host or '', 'path', was.path or '',
      'receipt', string.sub(receipt, 1, 4096))
  end
end
