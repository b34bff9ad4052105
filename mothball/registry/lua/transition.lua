-- include: common
-- include: job
-- include: state
-- Move a workspace from one state to another (D-03): one effect, one counter by reason, one event, unless anything changed meanwhile.
--
-- ARGV  1 id   2 state   3 reason   4 by whom   5 detail   6 what is known of the end of its processes, JSON ('' nothing)
--       7 job that asks ('' none: then no other job may hold the lease)   8 its fence
--       9 '1' not while somebody is present or a job is queued, '2' not while somebody is present, '' whatever they do
--       10... what was seen: fields and values in turn
-- Returns {'done', HGETALL of the record} | {'same', HGETALL of the record: it is in that state already} | {'changed', what}
--       | {'busy', job that holds the lease} | {'state', state from which there is no way} | {'gone', reason} | {'not_found', ''}
local COUNTED = {stopped = 'stopped:', stranded = 'stranded:', abandoned = 'abandoned:'}
local NAMES = {active = 'workspace.withdrawn'}
local id, to, reason, by, detail, evidence, job, fence, quiet = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6), arg(7), arg(8), arg(9)
local code, why = workspace_error(id)
if code then
  return {code, why}
end
local record = key('ws', id)
if job ~= '' and run_of(job, fence) ~= 'run' then
  return {'changed', 'lease'}
end
local from = redis.call('HGET', record, 'state') or 'active'
if from == to then
  return {'same', redis.call('HGETALL', record)}
end
local same, till = as_seen(record, 10)
if not same then
  return {'changed', 'record'}
end
if quiet ~= '' then
  local other = holder_of(id, job)
  if other then
    return {'busy', other}
  elseif present(id, till) then
    return {'changed', 'presence'}
  elseif quiet == '1' and job_queued(id) then
    return {'changed', 'queued'}
  end
end
if not move(id, to, reason) then
  return {'state', from}
end
local fields = {'workspace', id, 'reason', reason, 'by', by, 'from', from, 'host', redis.call('HGET', record, 'host') or ''}
local function add(name, value)
  if value ~= '' then
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
end
add('detail', detail)
add('job', job)
add('evidence', evidence)
if to == 'stranded' then
  -- Whoever was missed is named here once; from now on only those count who come back.
  add('holders', string.sub(table.concat(redis.call('ZRANGE', key('presence', id), 0, -1), ' '), 1, 4096))
  redis.call('DEL', key('presence', id))
end
if COUNTED[to] then
  count(COUNTED[to] .. reason)
end
event(NAMES[to] or 'workspace.' .. to, unpack(fields))
return {'done', redis.call('HGETALL', record)}
