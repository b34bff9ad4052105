-- include: common
-- include: budget
-- What the collector of a host found its store to hold: from here on the budget counts these bytes instead of what was added up.
--
-- ARGV  1 host   2... workspace, its stored_bytes as they were before the store was read ('' no record), bytes found; and so on
-- Returns how many figures were corrected
-- A workspace that is being captured, or was since, is left as it is: what was found is not what its store holds by now.
local host = arg(1)
local corrected = 0
for n = 7, #ARGV, 3 do
  local ws, seen, found = ARGV[n], ARGV[n + 1], ARGV[n + 2]
  local field = host .. ' ' .. ws
  local v = redis.call('HMGET', key('ws', ws), 'host', 'stored_bytes')
  local kept = redis.call('HGET', key('budget', 'retained'), field) or '0'
  if v[1] == host then
    if kept ~= '0' then
      -- A record that was made again from the store, after its tombstone had run out, has its captures back.
      redis.call('HDEL', key('budget', 'retained'), field)
      budget_add('retained', -tonumber(kept))
    end
    if seen ~= '' and (v[2] or '0') == seen and redis.call('EXISTS', key('lease', ws)) == 0 then
      redis.call('HSET', key('ws', ws), 'stored_bytes', found)
      budget_settle(ws)
      corrected = corrected + (seen ~= found and 1 or 0)
    end
  else
    if found == '0' then
      redis.call('HDEL', key('budget', 'retained'), field)
    else
      redis.call('HSET', key('budget', 'retained'), field, found)
    end
    budget_add('retained', tonumber(found) - tonumber(kept))
    corrected = corrected + (kept ~= found and 1 or 0)
  end
end
return corrected
