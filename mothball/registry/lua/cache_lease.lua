-- include: common
-- Who is using an image cache right now: leases that run out by themselves.
--
-- ARGV  1 cache   2 'take' | 'renew' | 'drop'   3 lease   4 ms it lasts   5 who holds it   6 most leases of one cache
-- Returns {'ok', began, until} | {'lost'} (renew: it has run out) | {'full'} | {'ok', 1 | 0} (drop)
local leases, verb, id, lasts = key('cache', 'lease', arg(1)), arg(2), arg(3), tonumber(arg(4))
local flat = redis.call('HGETALL', leases)
local live, mine = 0, nil
for n = 1, #flat, 2 do
  local began, ends = string.match(flat[n + 1], '^(%d+):(%d+):')
  if not ends or tonumber(ends) <= NOW then
    redis.call('HDEL', leases, flat[n])
  else
    live = live + 1
    if flat[n] == id then
      mine = began
    end
  end
end
if verb == 'drop' then
  return {'ok', redis.call('HDEL', leases, id)}
end
if verb == 'renew' and not mine then
  return {'lost'}
end
if not mine and live >= tonumber(arg(6)) then
  return {'full'}
end
mine = mine or int(NOW)
redis.call('HSET', leases, id, mine .. ':' .. int(NOW + lasts) .. ':' .. arg(5))
if redis.call('PTTL', leases) < lasts then
  redis.call('PEXPIRE', leases, int(lasts))
end
return {'ok', mine, int(NOW + lasts)}
