-- include: common
-- Give the fleet or a repository a policy, or take it away. The sweeps then look at every workspace again.
--
-- ARGV  1 'fleet' | 'repo:<repo>'   2 policy, JSON ('' none)   3 by whom   4 the walk that this begins, JSON
--       5 version of all policies as they were read ('' any)
-- Returns {1 when that changed anything, 0 when it says so already, -1 when others changed a policy since, version}
local level, policy, by = arg(1), arg(2), arg(3)
local book = key('policies')
local was = redis.call('HGET', book, 'version') or '0'
if arg(5) ~= '' and arg(5) ~= was then
  return {-1, tonumber(was)}
end
if (redis.call('HGET', book, level) or '') == policy then
  return {0, tonumber(was)}
end
if policy == '' then
  redis.call('HDEL', book, level)
else
  redis.call('HSET', book, level, policy)
end
redis.call('HSET', book, 'walk', arg(4))
local version = redis.call('HINCRBY', book, 'version', 1)
event('policy.changed', 'level', level, 'value', policy, 'by', by)
return {1, version}
