-- include: common
-- One look at the record and, when there is none, at its tombstone.
--
-- ARGV  1 id
-- Returns {'ok', HGETALL of the record} | {'gone', reason} | {'not_found', ''}
local record = redis.call('HGETALL', key('ws', arg(1)))
if #record > 0 then
  return {'ok', record}
end
local code, reason = workspace_error(arg(1))
return {code, reason}
