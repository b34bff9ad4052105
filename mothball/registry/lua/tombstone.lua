-- include: common
-- What is known of a workspace that is gone.
--
-- ARGV  1 id
-- Returns {ms the tombstone still stays, HGETALL of it}, an empty list of fields when there is none or the workspace is registered
local tomb = key('ws', 'gone', arg(1))
if redis.call('EXISTS', key('ws', arg(1))) == 1 then
  return {0, {}}
end
return {redis.call('PTTL', tomb), redis.call('HGETALL', tomb)}
