-- include: common
-- One winner per sweep and time slot, however many beats run.
--
-- ARGV  1 sweep   2 interval ms
-- Returns 1 for the winner, else 0
local interval = tonumber(arg(2))
local slot = key('slot', arg(1), int(math.floor(NOW / interval)))
if redis.call('SET', slot, '1', 'NX', 'PX', int(2 * interval)) then
  return 1
end
return 0
