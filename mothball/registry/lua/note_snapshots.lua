-- include: common
-- The snapshots of a workspace changed in its host's store: how many there are, which one is new, which went.
--
-- ARGV  1 id   2 host   3 how many there are now   4 name of the new one ('' none)   5 its digest   6 its job
--       7 why those below went   8... names of those that went
-- Returns {'ok'} | {'other_host', host} | {'gone', reason} | {'not_found', ''}
-- Asked twice about one new snapshot it counts once: names are numbers that only grow. Asked twice by one job about what went it
-- counts once as well: jobs of a workspace run one after the other, so the last one is all that has to be remembered.
local id, host, total, made, digest, job, why = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6), arg(7)
local code, reason = workspace_error(id)
if code then
  return {code, reason}
end
local record = key('ws', id)
local v = redis.call('HMGET', record, 'host', 'last_snapshot', 'forget_job')
if v[1] ~= host then
  return {'other_host', v[1]}
end
redis.call('HSET', record, 'snapshots', total)
local number = tonumber(string.match(made, '^snap%-(%d+)$') or '0')
if number > tonumber(v[2] or '0') then
  redis.call('HSET', record, 'last_snapshot', int(number))
  count('snapshots')
  event('workspace.snapshotted', 'workspace', id, 'snapshot', made, 'digest', digest, 'job', job, 'host', host)
end
local gone = {}
for n = 13, #ARGV do
  gone[#gone + 1] = ARGV[n]
end
if #gone > 0 and (job == '' or v[3] ~= job) then
  if job ~= '' then
    redis.call('HSET', record, 'forget_job', job)
  end
  count('snapshots_forgotten', #gone)
  local names = string.sub(table.concat(gone, ' '), 1, 4096)
  event('workspace.snapshots_forgotten', 'workspace', id, 'snapshots', names, 'reason', why, 'host', host)
end
return {'ok'}
