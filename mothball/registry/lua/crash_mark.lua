-- include: common
-- include: crash
-- Change what stands in a crash report's record: that it is kept, that it is being deleted, what is known of its package.
--
-- ARGV  1 id   2 kind of the event ('' none)   3 by whom   4... fields and values in turn
-- Returns {'ok', HGETALL of the record} | {'not_found'}. An event only when something changed.
local id, kind, by = arg(1), arg(2), arg(3)
local record = crash_key(id)
if redis.call('EXISTS', record) == 0 then
  return {'not_found'}
end
local changed = false
for n = 9, #ARGV, 2 do
  if redis.call('HGET', record, ARGV[n]) ~= ARGV[n + 1] then
    redis.call('HSET', record, ARGV[n], ARGV[n + 1])
    changed = true
  end
end
if changed and kind ~= '' then
  event(kind, 'report', id, 'workspace', redis.call('HGET', record, 'workspace') or '', 'by', by)
end
return {'ok', redis.call('HGETALL', record)}
