-- include: common
-- When sweeps look at workspaces again, unless something changed since they looked.
--
-- ARGV  1 'evict' | 'stop'   2 version of the policies by which it was decided ('' any)
--       3... id, score as it was read, ms of the next look ('' never by time alone), in turn
-- Returns how many were as they were read; none when the policies are others by now
local due = key('ws', 'due', arg(1))
local done = 0
if arg(2) ~= '' and arg(2) ~= (redis.call('HGET', key('policies'), 'version') or '0') then
  return 0
end
for n = 8, #ARGV, 3 do
  local id, seen, at = ARGV[n], ARGV[n + 1], ARGV[n + 2]
  if tonumber(redis.call('ZSCORE', due, id) or '') == tonumber(seen) then
    done = done + 1
    if at == '' or redis.call('EXISTS', key('ws', id)) == 0 then
      redis.call('ZREM', due, id)
    else
      redis.call('ZADD', due, at, id)
    end
  end
end
return done
