-- include: common
-- include: crash
-- A crash report that a host's store has and nobody knows (Redis was lost, or it came back from the trash): its record again.
--
-- ARGV  1 id   2 workspace   3 repo ('' none)   4 host   5 ms at which it happened   6 occurrence, JSON
--       7... the record's other fields, name and value in turn
-- Returns 1 when the record was made, 0 when there was one. Counts no report: it was counted when it was made.
local id, ws, repo, host, at = arg(1), arg(2), arg(3), arg(4), int(math.min(tonumber(arg(5)), NOW))
local record = crash_key(id)
if redis.call('EXISTS', record) == 1 then
  return 0
end
redis.call('HSET', record, 'id', id, 'workspace', ws, 'repo', repo, 'host', host, 'at', at, 'count', '1', 'first_at', at,
  'last_at', at, 'occurrences', '[' .. arg(6) .. ']', unpack(ARGV, 12))
crash_index(id, ws, repo, host, at)
event('crash.found', 'report', id, 'workspace', ws, 'host', host)
return 1
