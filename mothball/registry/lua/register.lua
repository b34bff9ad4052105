-- include: common
-- Make a workspace record, or find the same one (same id, host and path).
--
-- ARGV  1 id   2 host   3 path   4 repo ('' none)   5 agent name ('' choose one when there is a repo, D-05)
--       6 ms until its deadline ('' none)   7... the record's other fields, name and value in turn
-- Returns {'created' | 'exists' | 'other', HGETALL of the record}
-- A record that was released goes on from its tombstone: its fence and generation never fall back.
local id, host, path, repo, agent, expires_in = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6)
local record = key('ws', id)
local there = redis.call('HMGET', record, 'host', 'path')
if there[1] then
  if there[1] == host and there[2] == path then
    return {'exists', redis.call('HGETALL', record)}
  end
  return {'other', redis.call('HGETALL', record)}
end

local tomb = key('ws', 'gone', id)
local old = redis.call('HMGET', tomb, 'fence', 'generation')
-- One more than the tombstone's: a run that outlived the release must not hold the new record's number.
local fence = old[1] and int(tonumber(old[1]) + 1) or '0'
local generation = old[2] or '0'
redis.call('DEL', tomb)

if agent == '' and repo ~= '' then
  agent = 'agent-' .. int(redis.call('INCR', key('agents', repo)))
end
local expires_at = ''
if expires_in ~= '' then
  expires_at = int(NOW + expires_in)
  redis.call('ZADD', key('ws', 'by', 'deadline'), expires_at, id)
end
redis.call('HSET', record,
  'id', id, 'host', host, 'path', path, 'repo', repo, 'agent_name', agent, 'state', 'active',
  'created_at', int(NOW), 'last_active', int(NOW), 'last_signal', 'register', 'expires_at', expires_at,
  'fence', fence, 'generation', generation, 'registration', int(NOW) .. ':' .. fence, unpack(ARGV, 12))
redis.call('ZADD', key('ws', 'by', 'created'), int(NOW), id)
redis.call('ZADD', key('ws', 'by', 'active'), int(NOW), id)
redis.call('SADD', key('ws', 'host', host), id)
if repo ~= '' then
  redis.call('SADD', key('ws', 'repo', repo), id)
end
count('workspaces_registered')
event('workspace.registered', 'workspace', id, 'host', host, 'repo', repo, 'agent_name', agent, 'generation', generation)
return {'created', redis.call('HGETALL', record)}
