-- include: common
-- include: state
-- Pin or unpin a workspace; an event only when that changes something (Q-08: audited). Either says what a record that was made again
-- after a loss of Redis does not know.
--
-- ARGV  1 id   2 '1' pin | '0' unpin   3 reason   4 by whom
-- Returns {'ok', HGETALL of the record} | {'gone', reason} | {'not_found', ''}
local id, pinned, reason, by = arg(1), arg(2), arg(3), arg(4)
local code, why = workspace_error(id)
if code then
  return {code, why}
end
local record = key('ws', id)
local v = redis.call('HMGET', record, 'pinned', 'pin_reason', 'unknown')
local unknown, lost = {}, false
for _, name in ipairs(cjson.decode((v[3] or '') ~= '' and v[3] or '[]')) do
  if name == 'pinned' or name == 'pin_reason' then
    lost = true
  else
    unknown[#unknown + 1] = name
  end
end
if lost or (v[1] or '0') ~= pinned or (v[2] or '') ~= reason then
  redis.call('HSET', record, 'pinned', pinned, 'pin_reason', reason)
  if lost and #unknown > 0 then
    redis.call('HSET', record, 'unknown', cjson.encode(unknown))
  elseif lost then
    redis.call('HDEL', record, 'unknown') -- an empty table has no JSON of its own in Lua
  end
  mark_due(id)
  event(pinned == '1' and 'workspace.pinned' or 'workspace.unpinned', 'workspace', id, 'reason', reason, 'by', by)
end
return {'ok', redis.call('HGETALL', record)}
