-- include: common
-- Blobs of an image cache were used just now. The least recently used are forgotten beyond a number: their file times count then.
--
-- ARGV  1 cache   2 host   3 most that are remembered   4 ms without any use after which all is forgotten
--       5... digests
-- Returns how many are remembered, -1 when no worker has announced the host
if redis.call('EXISTS', key('host', arg(2))) == 0 then
  return -1
end
local used = key('cache', 'used', arg(1))
for n = 10, #ARGV do
  redis.call('ZADD', used, int(NOW), ARGV[n])
end
redis.call('ZREMRANGEBYRANK', used, 0, -(tonumber(arg(3)) + 1))
redis.call('PEXPIRE', used, arg(4))
return redis.call('ZCARD', used)
