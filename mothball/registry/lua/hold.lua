-- include: common
-- include: state
-- Put a workspace on hold, or end a hold: a person's veto against any reclaim. Saying the same again changes nothing.
--
-- ARGV  1 id   2 'hold' | 'unhold'   3 reason of a hold, or the id of the hold to end ('' all)   4 by whom   5 most holds
-- Returns {'ok', HGETALL of the record} | {'unknown', ''} (no such hold) | {'full', ''} | {'gone', reason} | {'not_found', ''}
local id, verb, text, by = arg(1), arg(2), arg(3), arg(4)
local code, why = workspace_error(id)
if code then
  return {code, why}
end
local record = key('ws', id)
local holds = cjson.decode(redis.call('HGET', record, 'holds') or '[]')

local function write(all)
  if #all == 0 then
    redis.call('HDEL', record, 'holds') -- an empty table has no JSON of its own in Lua
  else
    redis.call('HSET', record, 'holds', cjson.encode(all))
  end
end

if verb == 'hold' then
  local last = 0
  for _, each in ipairs(holds) do
    if each.reason == text and each.by == by then
      return {'ok', redis.call('HGETALL', record)}
    end
    last = math.max(last, tonumber(string.match(each.id or '', '^hold%-(%d+)$') or '0'))
  end
  if #holds >= tonumber(arg(5)) then
    return {'full', ''}
  end
  local name = 'hold-' .. int(last + 1)
  holds[#holds + 1] = {id = name, reason = text, by = by, at = NOW}
  write(holds)
  event('workspace.held', 'workspace', id, 'hold', name, 'reason', text, 'by', by)
else
  local kept, ended = {}, {}
  for _, each in ipairs(holds) do
    if text == '' or each.id == text then
      ended[#ended + 1] = each.id
    else
      kept[#kept + 1] = each
    end
  end
  if #ended == 0 then
    return {text == '' and 'ok' or 'unknown', text == '' and redis.call('HGETALL', record) or ''}
  end
  write(kept)
  mark_due(id)
  event('workspace.unheld', 'workspace', id, 'hold', table.concat(ended, ' '), 'by', by)
end
return {'ok', redis.call('HGETALL', record)}
