-- include: common
-- A prune of an image cache ended: its counters, one event when it changed anything, and its result for those who look.
--
-- ARGV  1 cache   2 run, counted once however often it is said   3 ms the result is kept   4 result, JSON   5 host   6 folder
--       7 bytes freed   8 blobs freed   9 reason   10 '1' when there is something to tell beside what was freed
-- Returns 1 when it was new, else 0
local last, run, blobs = key('cache', 'last', arg(1)), arg(2), tonumber(arg(8))
if redis.call('HGET', last, 'run') == run then
  return 0
end
redis.call('HSET', last, 'run', run, 'at', int(NOW), 'result', arg(4))
redis.call('PEXPIRE', last, arg(3))
count('cache_prunes')
if blobs > 0 then
  count('cache_freed_bytes', arg(7))
  count('cache_freed_blobs', arg(8))
end
if blobs > 0 or arg(10) == '1' then
  event('cache.pruned', 'host', arg(5), 'dir', arg(6), 'freed_bytes', arg(7), 'freed_blobs', arg(8), 'reason', arg(9))
end
return 1
