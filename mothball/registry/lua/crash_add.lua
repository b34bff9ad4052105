-- include: common
-- include: job
-- include: crash
-- A crash report was stored: its record, indexes, counter and event. One of the same failure that came first within the window gets
-- this one counted on it instead, and the caller takes away what it has stored.
--
-- ARGV  1 job   2 fence   3 id   4 workspace   5 repo ('' none)   6 host   7 signature   8 scope   9 ms at which it happened
--       10 ms of the window (0: every failure has a report of its own)   11 occurrence, JSON   12 most occurrences
--       13... the record's other fields, name and value in turn
-- Returns {'added' | 'again', HGETALL of the report's record} | {'lost'}
-- Asked twice by one job it answers the same and counts nothing again.
local job, fence, id, ws, repo, host = arg(1), arg(2), arg(3), arg(4), arg(5), arg(6)
local signature, scope, at, window = arg(7), arg(8), arg(9), tonumber(arg(10))
if run_of(job, fence) ~= 'run' then
  return {'lost'}
end
local known = redis.call('HGET', key('crash', 'draft', job), 'report')
if known and redis.call('EXISTS', crash_key(known)) == 1 then
  return {known == id and 'added' or 'again', redis.call('HGETALL', crash_key(known))}
end
local sig = key('crash', 'sig', signature, scope)
local same = crash_same(sig, window)
if same and same ~= id then
  crash_again(same, job, ws, at, arg(11), tonumber(arg(12)))
  return {'again', redis.call('HGETALL', crash_key(same))}
end
local record = crash_key(id)
local new = redis.call('EXISTS', record) == 0
redis.call('HSET', record, 'id', id, 'workspace', ws, 'repo', repo, 'host', host, 'signature', signature, 'scope', scope, 'at', at,
  unpack(ARGV, 18))
if new then
  redis.call('HSET', record, 'count', '1', 'first_at', at, 'last_at', at, 'occurrences', '[' .. arg(11) .. ']', 'keep', '0')
  crash_index(id, ws, repo, host, at)
  if window > 0 then
    redis.call('SET', sig, id, 'PX', int(window))
  end
  count('crash_reports')
  local v = redis.call('HMGET', record, 'title', 'digest', 'source', 'by')
  event('workspace.crashed', 'workspace', ws, 'report', id, 'title', v[1] or '', 'signature', signature, 'digest', v[2] or '',
    'source', v[3] or '', 'by', v[4] or '', 'host', host, 'job', job)
end
crash_done(job, id)
return {'added', redis.call('HGETALL', record)}
