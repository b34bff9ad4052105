-- include: common
-- include: crash
-- The files of a crash report are gone: its record goes last, so that whatever is left of a report can be found by it.
--
-- ARGV  1 id   2 why   3 by whom   4 ms for which the collector is told that the last report of a workspace went
-- Returns 1 when there was a record, else 0
local id, why, by = arg(1), arg(2), arg(3)
local record = crash_key(id)
local v = redis.call('HMGET', record, 'id', 'workspace', 'repo', 'host', 'signature', 'scope', 'bytes')
if not v[1] then
  return 0
end
local ws, repo, host = v[2] or '', v[3] or '', v[4] or ''
redis.call('DEL', record)
redis.call('ZREM', key('crash', 'by', 'at'), id)
redis.call('ZREM', key('crash', 'host', host), id)
redis.call('ZREM', key('crash', 'ws', ws), id)
if repo ~= '' then
  redis.call('ZREM', key('crash', 'repo', repo), id)
end
local sig = key('crash', 'sig', v[5] or '', v[6] or '')
if redis.call('GET', sig) == id then
  redis.call('DEL', sig)
end
crash_note(ws, host)
if redis.call('EXISTS', key('ws', ws)) == 0 and redis.call('EXISTS', key('crash', 'ws', ws)) == 0 then
  -- Only its reports kept the layout in the store. A registry that lost its data says nothing of the kind.
  redis.call('SET', key('crash', 'gone', host, ws), '1', 'PX', arg(4))
end
count('crash_reports_deleted')
event('crash.deleted', 'report', id, 'workspace', ws, 'host', host, 'reason', why, 'by', by, 'bytes', v[7] or '0')
return 1
