-- include: common
-- A sign of life. Moves last_active only when strictly more than the debounce has passed (D-06, 6.2).
--
-- ARGV  1 id   2 signal   3 debounce ms
-- Returns {'ok', moved 0|1, last_active, signal that set it} | {'gone', reason} | {'not_found', ''}
local id, signal, debounce = arg(1), arg(2), tonumber(arg(3))
local code, reason = workspace_error(id)
if code then
  return {code, reason}
end
local record = key('ws', id)
local v = redis.call('HMGET', record, 'last_active', 'last_signal')
if NOW - tonumber(v[1]) > debounce then
  redis.call('HSET', record, 'last_active', int(NOW), 'last_signal', signal)
  redis.call('ZADD', key('ws', 'by', 'active'), int(NOW), id)
  return {'ok', 1, int(NOW), signal}
end
return {'ok', 0, v[1], v[2]}
