-- include: common
-- include: state
-- Announce a stop or an eviction: one event per workspace, action and time at which it is due, whoever asks how often.
--
-- ARGV  1 id   2 action   3 ms at which it is due   4 rule   5 detail   6... what was seen: fields and values in turn
-- Returns 1 for the caller that announced it, else 0
local id, action, due = arg(1), arg(2), arg(3)
local record = key('ws', id)
if redis.call('EXISTS', record) == 0 or not as_seen(record, 6) then
  return 0
end
local noticed = cjson.decode(redis.call('HGET', record, 'noticed') or '{}')
if noticed[action] == tonumber(due) then
  return 0
end
noticed[action] = tonumber(due)
redis.call('HSET', record, 'noticed', cjson.encode(noticed))
count('notices:' .. action)
event('workspace.notice', 'workspace', id, 'action', action, 'due', due, 'rule', arg(4), 'detail', arg(5),
  'host', redis.call('HGET', record, 'host') or '')
return 1
