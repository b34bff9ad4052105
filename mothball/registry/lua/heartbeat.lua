-- include: common
-- A worker's sign of life for its host.
--
-- ARGV  1 host   2 what it says about itself, JSON
-- Returns 1 for the first sign of this host ever, else 0
local host, info = arg(1), arg(2)
local record = key('host', host)
local new = redis.call('EXISTS', record) == 0
redis.call('HSET', record, 'host', host, 'info', info, 'last_seen', int(NOW))
redis.call('ZADD', key('hosts'), int(NOW), host)
-- A host counted as offline stays so until check_hosts has said that it is back: once, in one place.
if redis.call('ZSCORE', key('hosts', 'offline'), host) then
  redis.call('ZADD', key('hosts', 'offline'), int(NOW), host)
else
  redis.call('ZADD', key('hosts', 'online'), int(NOW), host)
end
if new then
  event('host.announced', 'host', host)
end
return new and 1 or 0
