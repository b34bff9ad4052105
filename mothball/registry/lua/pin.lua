-- include: common
-- include: state
-- Pin or unpin a workspace; an event only when that changes something (Q-08: audited).
--
-- ARGV  1 id   2 '1' pin | '0' unpin   3 reason   4 by whom
-- Returns {'ok', HGETALL of the record} | {'gone', reason} | {'not_found', ''}
local id, pinned, reason, by = arg(1), arg(2), arg(3), arg(4)
local code, why = workspace_error(id)
if code then
  return {code, why}
end
local record = key('ws', id)
local v = redis.call('HMGET', record, 'pinned', 'pin_reason')
if (v[1] or '0') ~= pinned or (v[2] or '') ~= reason then
  redis.call('HSET', record, 'pinned', pinned, 'pin_reason', reason)
  mark_due(id)
  event(pinned == '1' and 'workspace.pinned' or 'workspace.unpinned', 'workspace', id, 'reason', reason, 'by', by)
end
return {'ok', redis.call('HGETALL', record)}
