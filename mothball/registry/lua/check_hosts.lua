-- include: common
-- Which hosts fell silent, which came back? Each change is reported by exactly one call and leaves one event.
--
-- ARGV  1 ms of silence after which a host is offline (at equality it is online)   2 ms of silence after which a host
--       without workspaces is forgotten   3 most hosts per list
-- Returns {hosts that went offline, hosts that came back}
local limit, forget, batch = tonumber(arg(1)), tonumber(arg(2)), tonumber(arg(3))
local edge = int(NOW - limit)
local online, offline = key('hosts', 'online'), key('hosts', 'offline')

local gone = redis.call('ZRANGEBYSCORE', online, '-inf', '(' .. edge, 'LIMIT', 0, batch)
for _, host in ipairs(gone) do
  local seen = redis.call('ZSCORE', online, host)
  redis.call('ZREM', online, host)
  redis.call('ZADD', offline, seen, host)
  event('host.offline', 'host', host, 'last_seen', seen)
end

local back = redis.call('ZRANGEBYSCORE', offline, edge, '+inf', 'LIMIT', 0, batch)
for _, host in ipairs(back) do
  local seen = redis.call('ZSCORE', offline, host)
  redis.call('ZREM', offline, host)
  redis.call('ZADD', online, seen, host)
  event('host.online', 'host', host, 'last_seen', seen)
end

for _, host in ipairs(redis.call('ZRANGEBYSCORE', offline, '-inf', '(' .. int(NOW - forget), 'LIMIT', 0, batch)) do
  if redis.call('EXISTS', key('ws', 'host', host)) == 0 then
    redis.call('ZREM', offline, host)
    redis.call('ZREM', key('hosts'), host)
    redis.call('DEL', key('host', host))
    event('host.forgotten', 'host', host)
  end
end
return {gone, back}
