-- Signs of life. Needs common.lua before it.
--
-- Every signal has its own last time in the record (`sig:<name>`, ms); last_active is the last time any of them counted.
local MOST_FIELDS = 100

-- sign(id, signal, debounce): returns moved 0|1, last_active, signal that set it. Moves a time only when strictly more than the
-- debounce (ms) has passed since (D-06), and never backwards: a Redis that took over may be a second behind.
local function sign(id, signal, debounce)
  local record = key('ws', id)
  local own = 'sig:' .. signal
  local v = redis.call('HMGET', record, 'last_active', 'last_signal', own)
  local last = tonumber(v[1] or '0')
  local moved = NOW - last > debounce
  -- Signals are words that producers choose: a record never grows without end because somebody invents new ones.
  local noted = NOW - tonumber(v[3] or '0') > debounce and (v[3] or redis.call('HLEN', record) < MOST_FIELDS)
  if moved and noted then
    redis.call('HSET', record, 'last_active', int(NOW), 'last_signal', signal, own, int(NOW))
  elseif moved then
    redis.call('HSET', record, 'last_active', int(NOW), 'last_signal', signal)
  elseif noted then
    redis.call('HSET', record, own, int(NOW))
  end
  if moved then
    redis.call('ZADD', key('ws', 'by', 'active'), int(NOW), id)
    return 1, int(NOW), signal
  end
  return 0, v[1], v[2]
end
