-- include: common
-- Where the walk through all records stands: begun, moved on or ended by one caller at a time.
--
-- ARGV  1 where it stood ('' nowhere: begin)   2 where it stands now, JSON ('' it is done)   3 ms after which a new walk may begin
--       only to begin:   4 the policy that the settings say, JSON   5 ms after which another of that kind may begin a walk
--       6 where a walk stands then that has to look at all workspaces, JSON
-- Returns 1 when it did, 2 when it began that other walk, else 0: a walk that began meanwhile goes first
local before, after, began = arg(1), arg(2), 1
local book = key('policies')
local v = redis.call('HMGET', book, 'walk', 'walked_at', 'setting', 'setting_at')
if (v[1] or '') ~= before then
  return 0
elseif before == '' then
  -- With other settings the times at which the sweeps look are others: one of ttl=never had none at all.
  local other = (v[3] or '{}') ~= arg(4) and math.abs(NOW - tonumber(v[4] or '0')) >= tonumber(arg(5))
  if v[2] and not other and math.abs(NOW - tonumber(v[2])) < tonumber(arg(3)) then
    return 0
  elseif other then
    after, began = arg(6), 2
    redis.call('HSET', book, 'setting', arg(4), 'setting_at', int(NOW))
  end
end
if after == '' then
  redis.call('HDEL', book, 'walk')
  redis.call('HSET', book, 'walked_at', int(NOW))
else
  redis.call('HSET', book, 'walk', after)
end
return began
