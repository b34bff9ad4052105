-- include: common
-- include: state
-- Bring a stopped or stranded workspace back to work (D-73).
--
-- ARGV  1 id   2 agent id ('' none)   3 by whom   4 generation it must be at ('' any)
-- Returns {outcome, HGETALL of the record, ''} | {'contended', HGETALL, job that must end first, or ''} | {'gone', reason}
--       | {'not_found', ''}; outcome is ok, contended, other_agent, already_resumed, abandoned or not_stranded
local id, agent, by, generation = arg(1), arg(2), arg(3), arg(4)
local code, why = workspace_error(id)
if code then
  return {code, why}
end
local record = key('ws', id)
local v = redis.call('HMGET', record, 'state', 'agent_id', 'generation', 'state_reason')
local state, outcome, job = v[1] or 'active', 'ok', nil
if state == 'active' then
  outcome = v[4] == 'resume' and 'already_resumed' or 'not_stranded'
elseif state == 'abandoned' then
  outcome = 'abandoned'
elseif state ~= 'stopped' and state ~= 'stranded' then
  outcome = 'not_stranded'
elseif generation ~= '' and generation ~= (v[3] or '0') then
  outcome = 'contended'
elseif state == 'stranded' and agent ~= (v[2] or '') then
  outcome = 'other_agent'
else
  job = come_back(id, 'resume')
  outcome = job and 'contended' or 'ok'
end
count('resumed:' .. outcome)
if outcome == 'ok' then
  event('workspace.resumed', 'workspace', id, 'by', by, 'from', state, 'agent_id', agent)
end
return {outcome, redis.call('HGETALL', record), job or ''}
