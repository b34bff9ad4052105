-- include: common
-- include: state
-- Is a workspace still as it was seen? Changes nothing.
--
-- ARGV  1 id   2... what was seen: fields and values in turn
-- Returns 'done' (it is) | 'changed' | 'gone'
local record = key('ws', arg(1))
if redis.call('EXISTS', record) == 0 then
  return 'gone'
end
return as_seen(record, 2) and 'done' or 'changed'
