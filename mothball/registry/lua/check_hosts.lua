-- include: common
-- Which hosts fell silent, which came back? Each change is reported by exactly one call and leaves one event. The queued jobs of
-- a host that came back, or that is forgotten, are due for ringing at once.
--
-- ARGV  1 ms of silence after which a host is offline (at equality it is online)   2 ms of silence after which a host
--       without workspaces is forgotten   3 most hosts per list
-- Returns {hosts that went offline, hosts that came back}
local limit, forget, batch = tonumber(arg(1)), tonumber(arg(2)), tonumber(arg(3))
local edge = int(NOW - limit)
local online, offline = key('hosts', 'online'), key('hosts', 'offline')

local function wake(host)
  local away = key('jobs', 'away', host)
  for _ = 1, math.ceil(redis.call('ZCARD', away) / 500) do
    for _, job in ipairs(redis.call('ZRANGE', away, 0, 499)) do
      redis.call('ZREM', away, job)
      redis.call('ZADD', key('jobs', 'ring'), int(NOW), job)
    end
  end
end

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
  wake(host)
  event('host.online', 'host', host, 'last_seen', seen)
end

-- Hosts that keep workspaces stay however long they are silent: they must not hide the others behind them.
local forgotten = 0
for _, host in ipairs(redis.call('ZRANGEBYSCORE', offline, '-inf', '(' .. int(NOW - forget), 'LIMIT', 0, 20 * batch)) do
  if forgotten < batch and redis.call('EXISTS', key('ws', 'host', host)) == 0 then
    forgotten = forgotten + 1
    redis.call('ZREM', offline, host)
    wake(host)
    redis.call('ZREM', key('hosts'), host)
    redis.call('DEL', key('host', host))
    event('host.forgotten', 'host', host)
  end
end
return {gone, back}
