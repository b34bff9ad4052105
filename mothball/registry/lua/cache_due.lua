-- include: common
-- One winner per host and interval, each host at its own moment in it.
--
-- ARGV  1 host   2 interval ms   3 offset ms: when the host's interval begins   4 'take' | 'back': give the turn to the next caller
-- Returns 1 for the winner, else 0
local interval = tonumber(arg(2))
local number = math.floor((NOW - tonumber(arg(3))) / interval)
local slot = key('slot', 'cache', arg(1), int(interval), int(number))
if arg(4) == 'back' then
  return redis.call('DEL', slot)
end
if redis.call('SET', slot, '1', 'NX', 'PX', int(2 * interval)) then
  return 1
end
return 0
