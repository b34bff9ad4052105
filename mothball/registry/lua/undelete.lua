-- include: common
-- include: job
-- include: burial
-- Bring a workspace back from its tombstone, as `stopped`: everything as it was, under a fence and a registration of its own.
--
-- ARGV  1 id   2 by whom   3 ms for which nothing that depends on time reclaims it
-- Returns {'ok', HGETALL of the record} | {'exists', HGETALL of the record} | {'not_found', ''} | {'bare', ''} (a tombstone that
--       an older version wrote, without the record)
local id, by = arg(1), arg(2)
local record, tomb = key('ws', id), key('ws', 'gone', id)
if redis.call('EXISTS', record) == 1 then
  return {'exists', redis.call('HGETALL', record)}
end
local flat = redis.call('HGETALL', tomb)
if #flat == 0 then
  return {'not_found', ''}
end
local was, fields, reason = {}, {}, ''
for n = 1, #flat, 2 do
  local name = string.match(flat[n], '^r:(.+)$')
  if name then
    was[name] = flat[n + 1]
    fields[#fields + 1] = name
    fields[#fields + 1] = flat[n + 1]
  elseif flat[n] == 'reason' then
    reason = flat[n + 1]
  end
end
if not was.host then
  return {'bare', ''}
end
local fence = next_fence(was.fence)
local active = int(math.max(NOW, tonumber(was.last_active or '0')))
redis.call('HSET', record, unpack(fields))
redis.call('HDEL', record, 'noticed', 'extensions')
-- What evicted it would do so again at once: whoever wanted it back has some time to hold, pin or resume it.
redis.call('HSET', record, 'state', 'stopped', 'state_since', int(NOW), 'state_reason', 'undelete', 'fence', fence,
  'registration', int(NOW) .. ':' .. fence, 'last_active', active, 'last_signal', 'undelete',
  'extended_until', int(math.max(NOW + arg(3), tonumber(was.extended_until or '0'))))
redis.call('DEL', tomb)
local repo = was.repo or ''
redis.call('ZADD', key('ws', 'by', 'created'), was.created_at or int(NOW), id)
redis.call('ZADD', key('ws', 'by', 'active'), active, id)
if (was.expires_at or '') ~= '' then
  redis.call('ZADD', key('ws', 'by', 'deadline'), was.expires_at, id)
end
redis.call('SADD', key('ws', 'host', was.host), id)
if repo ~= '' then
  redis.call('SADD', key('ws', 'repo', repo), id)
  if (was.digest or '') ~= '' then
    redis.call('ZADD', key('ws', 'good', was.host, repo), (was.last_good_at or '') ~= '' and was.last_good_at or '0', id)
  end
end
census(id, '', 'stopped')
budget_unbury(id)
mark_due(id)
count('workspaces_undeleted')
event('workspace.undeleted', 'workspace', id, 'by', by, 'evicted_for', reason, 'host', was.host, 'repo', repo)
return {'ok', redis.call('HGETALL', record)}
