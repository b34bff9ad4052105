-- include: common
-- include: signs
-- A sign of life. Moves last_active only when strictly more than the debounce has passed (D-06, 6.2).
--
-- ARGV  1 id   2 signal   3 debounce ms
-- Returns {'ok', moved 0|1, last_active, signal that set it} | {'gone', reason} | {'not_found', ''}
local id = arg(1)
local moved, at, by = sign(id, arg(2), tonumber(arg(3)))
if not moved then
  local code, reason = workspace_error(id)
  return {code or 'not_found', reason or ''}
end
return {'ok', moved, at, by}
