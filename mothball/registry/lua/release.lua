-- include: common
-- include: job
-- Forget a workspace (B-42) and leave a tombstone that answers `gone`.
--
-- ARGV  1 id   2 by whom   3 ms the tombstone stays
-- Returns {'released'} | {'unknown'} | {'busy', job that holds the lease}
local id, by, ttl = arg(1), arg(2), arg(3)
local record = key('ws', id)
local holder = redis.call('HGET', key('lease', id), 'job')
local v = redis.call('HMGET', record, 'host', 'repo', 'path', 'digest', 'generation', 'fence', 'mode')
if not v[1] then
  return {'unknown'}
end
if holder then
  return {'busy', holder}
end
redis.call('DEL', record)
redis.call('ZREM', key('ws', 'by', 'created'), id)
redis.call('ZREM', key('ws', 'by', 'active'), id)
redis.call('ZREM', key('ws', 'by', 'deadline'), id)
redis.call('SREM', key('ws', 'host', v[1]), id)
if v[2] and v[2] ~= '' then
  redis.call('SREM', key('ws', 'repo', v[2]), id)
  redis.call('ZREM', key('ws', 'good', v[1], v[2]), id)
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
    redis.call('ZREM', key('jobs', 'away', v[1]), job)
    redis.call('ZADD', key('jobs', 'ring'), int(NOW), job)
  end
end
if redis.call('EXISTS', key('wait', id)) == 1 then
  redis.call('ZADD', key('waiting'), int(NOW), id)
else
  redis.call('ZREM', key('waiting'), id)
end
local tomb = key('ws', 'gone', id)
redis.call('HSET', tomb, 'reason', 'released', 'at', int(NOW), 'by', by, 'host', v[1], 'repo', v[2] or '', 'path', v[3] or '',
  'digest', v[4] or '', 'generation', v[5] or '0', 'fence', v[6] or '0', 'mode', v[7] or '')
redis.call('PEXPIRE', tomb, ttl)
count('workspaces_released')
event('workspace.released', 'workspace', id, 'reason', 'released', 'by', by, 'host', v[1], 'digest', v[4] or '')
return {'released'}
