-- include: common
-- include: state
-- Make a workspace's record again from what its host's store kept, after Redis was lost. Never overwrites, never revives.
--
-- ARGV  1 id   2 host   3 path   4 repo ('' none)   5 agent name ('' none)   6 highest fence that ever began on disk
--       7 digest of the latest capture ('' none)   8 when it was made, ms ('' unknown)   9 when the workspace was made, ms
--       10 its deadline, ms ('' none)   11... the record's other fields, name and value in turn
-- Returns {'rebuilt' | 'exists', HGETALL of the record} | {'gone', reason}
local id, host, path, repo, agent, fence = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6)
local digest, made, created, deadline = arg(7), arg(8), arg(9), arg(10)
local record = key('ws', id)
if redis.call('EXISTS', record) == 1 then
  return {'exists', redis.call('HGETALL', record)}
end
local code, reason = workspace_error(id)
if code == 'gone' then
  return {'gone', reason}
end

-- The times were a host's; none may lie in the registry's future.
local function past(ms)
  return int(math.min(tonumber(ms), NOW))
end

-- Above every fence on disk and in time: a run that outlived the old registry can hold no number that is given from here on.
fence = int(math.max(tonumber(fence) + 1, NOW))
made = made ~= '' and past(made) or ''
-- Nobody knows who held it or what waited for a verdict: for a week no rule by age or idleness takes it, nor does the cap.
local spared = int(NOW + 604800000)
redis.call('HSET', record, 'state_reason', 'rebuild', 'extended_until', spared,
  'id', id, 'host', host, 'path', path, 'state', 'active', 'created_at', past(created), 'last_active', int(NOW),
  'last_signal', 'rebuild', 'fence', fence, 'registration', int(NOW) .. ':' .. fence, 'rebuilt_at', int(NOW), unpack(ARGV, 16))
for name, value in pairs({repo = repo, agent_name = agent, expires_at = deadline, digest = short_digest(digest), last_good_at = made}) do
  if value ~= '' then
    redis.call('HSET', record, name, value)
  end
end
redis.call('ZADD', key('ws', 'by', 'created'), past(created), id)
redis.call('ZADD', key('ws', 'by', 'active'), int(NOW), id)
if deadline ~= '' then
  redis.call('ZADD', key('ws', 'by', 'deadline'), deadline, id)
end
redis.call('SADD', key('ws', 'host', host), id)
if repo ~= '' then
  redis.call('SADD', key('ws', 'repo', repo), id)
  if digest ~= '' then
    redis.call('ZADD', key('ws', 'good', host, repo), made ~= '' and made or '0', id)
  end
  -- D-05: a name that was given is never given again, as far as the store remembers.
  local number = string.match(agent, '^agent%-(%d+)$')
  if number and #number <= 15 and tonumber(number) > tonumber(redis.call('GET', key('agents', repo)) or '0') then
    redis.call('SET', key('agents', repo), int(tonumber(number)))
  end
end
mark_due(id)
count('workspaces_rebuilt')
event('workspace.rebuilt', 'workspace', id, 'host', host, 'repo', repo, 'digest', digest, 'fence', fence)
return {'rebuilt', redis.call('HGETALL', record)}
