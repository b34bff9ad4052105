-- include: common
-- Where the walk through all records stands: begun, moved on or ended by one caller at a time.
--
-- ARGV  1 where it stood ('' nowhere: begin)   2 where it stands now, JSON ('' it is done)   3 ms after which a new walk may begin
-- Returns 1 when it did, else 0: a walk that began meanwhile goes first
local before, after = arg(1), arg(2)
local book = key('policies')
local v = redis.call('HMGET', book, 'walk', 'walked_at')
if (v[1] or '') ~= before then
  return 0
elseif before == '' and v[2] and math.abs(NOW - tonumber(v[2])) < tonumber(arg(3)) then
  return 0
end
if after == '' then
  redis.call('HDEL', book, 'walk')
  redis.call('HSET', book, 'walked_at', int(NOW))
else
  redis.call('HSET', book, 'walk', after)
end
return 1
