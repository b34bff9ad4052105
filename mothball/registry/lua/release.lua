-- include: common
-- include: job
-- include: burial
-- Forget a workspace (B-42) and leave a tombstone that answers `gone`.
--
-- ARGV  1 id   2 by whom   3 ms the tombstone stays
-- Returns {'released'} | {'unknown'} | {'busy', job that holds the lease} | {'held', the holds, JSON}
local id, by, ttl = arg(1), arg(2), arg(3)
local record = key('ws', id)
if redis.call('EXISTS', record) == 0 then
  return {'unknown'}
end
local job = holder_of(id, '')
if job then
  return {'busy', job}
end
if held(record) then
  return {'held', redis.call('HGET', record, 'holds')}
end
local was = bury(id, 'released', '', by, ttl, '')
count('workspaces_released')
event('workspace.released', 'workspace', id, 'reason', 'released', 'by', by, 'host', was.host or '', 'digest', whole_digest(was.digest))
return {'released'}
