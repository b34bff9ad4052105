-- include: common
-- include: state
-- Put off what a notice announced: nothing that depends on time reclaims the workspace before a moment.
--
-- ARGV  1 id   2 until, ms   3 by whom   4 most extensions   5... what was seen: fields and values in turn
-- Returns 'done' | 'changed' | 'gone' | 'most' (no further extension) | 'earlier' (it says nothing new)
local id, till = arg(1), tonumber(arg(2))
local record = key('ws', id)
if redis.call('EXISTS', record) == 0 then
  return 'gone'
elseif not as_seen(record, 5) then
  return 'changed'
end
local v = redis.call('HMGET', record, 'extended_until', 'extensions')
local before, used = tonumber(v[1] or '0'), tonumber(v[2] or '0')
if used >= tonumber(arg(4)) then
  return 'most'
elseif till <= NOW or till <= before then
  return 'earlier'
end
redis.call('HSET', record, 'extended_until', int(till), 'extensions', int(used + 1))
mark_due(id)
count('extensions')
event('workspace.extended', 'workspace', id, 'until', int(till), 'by', arg(3), 'extensions', int(used + 1))
return 'done'
