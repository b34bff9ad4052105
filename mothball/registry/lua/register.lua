-- include: common
-- include: job
-- include: burial
-- include: signs
-- Make a workspace record, or find the same one (same id, host and path), which comes back to work when it was stopped or stranded.
--
-- ARGV  1 id   2 host   3 path   4 repo ('' none)   5 agent name ('' choose one when there is a repo, D-05)
--       6 ms until its deadline ('' none)   7 agent id ('' none)   8 runtime, JSON ('' none)   9 by whom
--       10 debounce ms of the sign of life that registering again is   11... the record's other fields, name and value in turn
-- Returns {'created' | 'exists' | 'resumed' | 'other' | 'stranded' (it belongs to another agent) | 'abandoned', HGETALL of the record}
--       | {'contended', HGETALL of the record, job that is ending it}
-- A record that was released or evicted goes on from its tombstone: its fence and generation never fall back.
local id, host, path, repo, agent, expires_in = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6)
local agent_id, runtime = arg(7), arg(8)
local record = key('ws', id)
local there = redis.call('HMGET', record, 'host', 'path', 'state', 'agent_id', 'runtime', 'last_active')
if there[1] then
  if there[1] ~= host or there[2] ~= path then
    return {'other', redis.call('HGETALL', record)}
  elseif there[3] == 'abandoned' then
    return {'abandoned', redis.call('HGETALL', record)}
  elseif there[3] == 'stranded' and (there[4] or '') ~= agent_id then
    count('resumed:other_agent')
    return {'stranded', redis.call('HGETALL', record)}
  elseif there[3] ~= 'stopped' and there[3] ~= 'stranded' then
    if runtime ~= '' and runtime ~= there[5] then
      redis.call('HSET', record, 'runtime', runtime) -- what runs there was started anew
      mark_due(id)
    end
    -- Whoever is told that it is there goes on to work in it: what was decided for its idleness before does not count any more.
    if NOW - tonumber(there[6] or '0') > tonumber(arg(10)) then
      sign(id, 'register', 0)
    end
    return {'exists', redis.call('HGETALL', record)}
  end
  local job = come_back(id, 'resume')
  count(job and 'resumed:contended' or 'resumed:ok')
  if job then
    return {'contended', redis.call('HGETALL', record), job}
  end
  if runtime ~= '' then
    redis.call('HSET', record, 'runtime', runtime) -- what ran before is over; this is what runs now
  end
  event('workspace.resumed', 'workspace', id, 'by', arg(9), 'from', there[3], 'agent_id', agent_id)
  return {'resumed', redis.call('HGETALL', record)}
end

local tomb = key('ws', 'gone', id)
local old = redis.call('HMGET', tomb, 'fence', 'generation')
-- One more than the tombstone's: a run that outlived the release must not hold the new record's number.
local fence = old[1] and next_fence(old[1]) or '0'
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
-- What is empty is not written: a record has to stay small when there are a million of them.
redis.call('HSET', record,
  'id', id, 'host', host, 'path', path, 'state', 'active', 'created_at', int(NOW), 'last_active', int(NOW),
  'last_signal', 'register', 'fence', fence, 'generation', generation, 'registration', int(NOW) .. ':' .. fence, unpack(ARGV, 16))
for name, value in pairs({repo = repo, agent_name = agent, expires_at = expires_at, agent_id = agent_id, runtime = runtime}) do
  if value ~= '' then
    redis.call('HSET', record, name, value)
  end
end
redis.call('ZADD', key('ws', 'by', 'created'), int(NOW), id)
redis.call('ZADD', key('ws', 'by', 'active'), int(NOW), id)
redis.call('SADD', key('ws', 'host', host), id)
if repo ~= '' then
  redis.call('SADD', key('ws', 'repo', repo), id)
end
budget_unbury(id)
mark_due(id)
count('workspaces_registered')
event('workspace.registered', 'workspace', id, 'host', host, 'repo', repo, 'agent_name', agent, 'generation', generation)
return {'created', redis.call('HGETALL', record)}
