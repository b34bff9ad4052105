-- include: common
-- include: state
-- Replace a workspace's policy, unless it changed since it was read: the text is opaque here, cjson may not keep all of it.
--
-- ARGV  1 id   2 the policy as it was read   3 the new policy   4 fields that a rebuilt record does not know ('' leave)
--       5 event   6 value for the event   7 by whom
-- Returns {'ok', HGETALL of the record} | {'changed', ''} | {'gone', reason} | {'not_found', ''}
local id, before, after, unknown = arg(1), arg(2), arg(3), arg(4)
local code, reason = workspace_error(id)
if code then
  return {code, reason}
end
local record = key('ws', id)
if (redis.call('HGET', record, 'policy') or '') ~= before then
  return {'changed', ''}
end
redis.call('HSET', record, 'policy', after)
if unknown ~= '' then
  redis.call('HSET', record, 'unknown', unknown)
end
mark_due(id)
event(arg(5), 'workspace', id, 'value', arg(6), 'by', arg(7))
return {'ok', redis.call('HGETALL', record)}
